"""The device's images: loading, partitioning and batching."""
