"""Trains a transformer without shortcuts on text: python run.py --depth 36 --attn espa"""
from minitf.cli.main import main

if __name__ == "__main__":
    main()
