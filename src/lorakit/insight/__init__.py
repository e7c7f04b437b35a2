"""What can be known before, beside and after training: what it will take, what each method costs, what an adapter is."""
