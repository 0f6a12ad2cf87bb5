# Install the OpenAI Python library
pip install openai

# Import and configure with API key
import openai
import os

# Method 1: Direct assignment (not recommended for production)
openai.api_key = "your-api-key"

# Method 2: Environment variable (recommended)
openai.api_key = os.getenv("OPENAI_API_KEY")

# Method 3: Using the client (newer approach)
from openai import OpenAI
client = OpenAI(api_key=os.getenv("OPENAI_API_KEY"))
