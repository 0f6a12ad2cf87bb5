# Prepare training data
training_data = [
    {"messages": [
        {"role": "system", "content": "You are a customer service assistant."},
        {"role": "user", "content": "I haven't received my order yet."},
        {"role": "assistant", "content": "I'm sorry to hear that. Could you please provide your order number so I can check the status for you?"}
    ]},
    # More examples...
]

# Create fine-tuning job
job = client.fine_tuning.jobs.create(
    training_file="file-abc123",  # ID of uploaded JSONL file
    model="gpt-3.5-turbo"
)

# Check fine-tuning status
job_status = client.fine_tuning.jobs.retrieve(job.id)

# Use fine-tuned model
response = client.chat.completions.create(
    model=job_status.fine_tuned_model,
    messages=[{"role": "user", "content": "Where is my package?"}]
)
