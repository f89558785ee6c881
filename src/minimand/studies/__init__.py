"""One module a method: problem, contenders, claims. Written with the public API, as a user would."""
