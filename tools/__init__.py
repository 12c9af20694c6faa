"""Tools beside the pipeline, run as: python -m tools.NAME"""
