"""The nouns of the REST API, as the server and its client both write them: what is asked, and what is answered."""
