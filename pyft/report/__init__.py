"""The report of a run: one HTML page that needs nothing else. `facts` reads the run's folder, `page` writes the page."""
