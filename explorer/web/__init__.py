"""The explorer's pages: rendered on the server, each view a URL."""
