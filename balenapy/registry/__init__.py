"""The OCI distribution protocol, client side."""
