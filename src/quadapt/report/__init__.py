"""What people read: messages, progress, tables, and the estimate of memory."""
