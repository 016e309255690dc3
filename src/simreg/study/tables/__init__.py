"""Tables in Markdown files, drawn from recorded JSON: `python -m simreg.study.tables`."""
