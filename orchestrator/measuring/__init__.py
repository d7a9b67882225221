"""Takes the constants of a profile from journals of live runs, and fills a profile with them."""
