"""What the black-box tests are made of: the program under test, its neighbours, and traffic."""
