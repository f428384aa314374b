"""The live view: a source's newest frame, decided as it comes, with a watch over frozen pictures and a lost signal."""
