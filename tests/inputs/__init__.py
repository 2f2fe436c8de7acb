"""Which bad inputs each public function refuses: a table, a module a package."""
