"""Tools that are not part of the pipeline; run them as: python -m tools.NAME"""
