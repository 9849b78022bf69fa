"""The name of main_lpd.py in the published code: its command lines run here as they are."""

from main_lpd import main
from util.cli import exit_on_user_error

if __name__ == "__main__":
    exit_on_user_error(main)
