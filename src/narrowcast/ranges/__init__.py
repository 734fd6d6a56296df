"""Which values a tensor held, what any format would make of them, which updates it would lose."""
