"""One file per op: its schema, its fake kernel, its autograd function and its public function."""
