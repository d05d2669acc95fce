"""HTTP: FastAPI for the federation's JSON, raw ASGI for the frames of the split plane."""
