"""What every other package rests on: values, interfaces, config, errors, random numbers."""
