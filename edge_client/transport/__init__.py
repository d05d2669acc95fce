"""HTTP to the server: requests, metered connections, retries, and simulated links."""

from edge_client.transport.client import Server
from edge_client.transport.http_transport import MeteredTransport
from edge_client.transport.link import Link
from edge_client.transport.retry import RetryPolicy
from edge_client.transport.split_client import Features, SamplesMissing, SplitPlane

__all__ = [
    "Features",
    "Link",
    "MeteredTransport",
    "RetryPolicy",
    "SamplesMissing",
    "Server",
    "SplitPlane",
]
