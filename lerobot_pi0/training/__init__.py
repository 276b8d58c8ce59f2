"""What happens when the policy trains: loss, optimizer, EMA, augmentation, LoRA layers, FSDP."""
