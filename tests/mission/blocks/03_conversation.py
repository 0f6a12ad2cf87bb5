# Initialize conversation history
messages = [
    {"role": "system", "content": "You are a helpful assistant."}
]

# Function to get response and update conversation
def chat_with_gpt(user_input):
    # Add user message to conversation
    messages.append({"role": "user", "content": user_input})
    
    # Get response from API
    response = client.chat.completions.create(
        model="gpt-3.5-turbo",
        messages=messages
    )
    
    # Extract assistant's reply
    assistant_response = response.choices[0].message.content
    
    # Add assistant response to conversation history
    messages.append({"role": "assistant", "content": assistant_response})
    
    return assistant_response
