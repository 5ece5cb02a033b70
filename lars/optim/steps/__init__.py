"""The update rules as pure functions of tensors: SGD with momentum, Adam, and the trust ratio."""
