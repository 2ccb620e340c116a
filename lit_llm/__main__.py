"""`python -m lit_llm` is the command `lit-llm`."""

from lit_llm.cli import main

if __name__ == "__main__":
    main()
