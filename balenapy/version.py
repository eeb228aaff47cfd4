"""The versions we announce."""

API_VERSION = "1.39"
# What --api-compat may promise at most: what later versions changed for clients is known and told in README.
MAX_COMPAT_API_VERSION = "1.44"
MIN_API_VERSION = "1.12"  # moby api/common.go MinVersion
# Clients compare this with Docker releases; 18.9.17 is the balena-engine release whose API we keep.
ENGINE_VERSION = "18.9.17"
ENGINE_NAME = "balena-engine"  # docker-progress looks at it: the `Total` line moves its bar
