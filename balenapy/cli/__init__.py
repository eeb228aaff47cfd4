"""The balenapy command line client."""
