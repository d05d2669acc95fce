"""The two planes over HTTP: FastAPI for the federation, raw ASGI for the tensors."""
