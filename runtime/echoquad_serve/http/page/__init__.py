"""The page of the service: HTML, style and one module of JavaScript, which the HTTP package serves as they are."""
