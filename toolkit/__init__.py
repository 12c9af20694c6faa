"""The toolkit: everything that the stage scripts share, a folder per concern."""
