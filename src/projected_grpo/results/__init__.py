"""Reading finished runs: their files, figures over seeds, tables, plots, the HTML report. Starts no run."""
