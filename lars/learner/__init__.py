"""The network with its optimizer and its task, and one optimizer step."""
