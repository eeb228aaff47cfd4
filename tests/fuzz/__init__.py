"""What reads bytes from outside: arbitrary bytes are parsed or refused by our own error, in bounded memory."""
