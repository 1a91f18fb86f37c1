"""Trains a transformer without shortcuts on text: python run.py --depth 36 --attn espa"""
import sys

try:
    from minitf.cli.main import main
except KeyboardInterrupt:
    sys.exit(130)

if __name__ == "__main__":
    main()
