"""The way to the server: one metered connection, typed errors, and patience."""

from edge_client.transport.metered import MeteredTransport
from edge_client.transport.retry import RetryPolicy
from edge_client.transport.server import Server

__all__ = ["MeteredTransport", "RetryPolicy", "Server"]
