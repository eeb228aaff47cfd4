"""Heavy work, run as short-lived processes."""
