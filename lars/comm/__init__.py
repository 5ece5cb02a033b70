"""Communication between ranks: the contract of a world, its backends, and the exchange of gradients."""
