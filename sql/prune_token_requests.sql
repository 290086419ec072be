-- Forget who asked for tokens longer than a minute ago.
delete from token_requests
where since < clock_timestamp() - interval '1 minute'
