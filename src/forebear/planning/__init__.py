"""What work will cost, before it is done."""
