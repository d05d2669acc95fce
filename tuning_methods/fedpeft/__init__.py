"""FedPEFT: a part of a whole model on the device is tuned and averaged."""
