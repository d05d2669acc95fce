"""What a device needs to compute a head: with NumPy, and with torch."""
