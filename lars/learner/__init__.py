"""What learns: the network, its optimizer, its task, and one optimizer step."""
