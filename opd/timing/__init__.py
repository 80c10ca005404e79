"""Where the seconds go, measured and predicted."""
