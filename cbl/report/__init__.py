"""From records to what people look at: the paper's numbers, verdicts, tables, the page, figures. Never trains."""
