"""HTTP: the page, the API, server-sent events, the KServe protocol, and what protects them."""
