"""The report of an evaluation for people: a page and a Markdown file with figures (``credence eval --report DIR``)."""
