"""What the tests of the extension share: sockets, and a relay stepped by the test."""
