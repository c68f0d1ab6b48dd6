"""What was asked, in which order, and how far it is: the part of the service that SQL decides."""
