"""From records to tables, beside the paper's own."""
