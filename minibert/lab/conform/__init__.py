"""What every kernel owes: judge (one result against its bound), check (the demands), gradcheck, the suite of them that
the pytest plugin puts to outside backends, and own_kernels (`--kernel FILE.py:FUNCTION=OP`)."""
