"""The report of a run: one HTML page that needs nothing else. `facts` reads the folder, `page` writes the page."""
