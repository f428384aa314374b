"""Storage commitment (PS3.4, annex J): its data sets, the reports that archives send, and those that the node owes."""
